"""A second model family: text only, dense, untied, with a state-dict layout and a chat template of its own."""
