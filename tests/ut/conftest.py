"""Settings of hypothesis for all unit tests."""

from __future__ import annotations

from hypothesis import settings

# A busy machine takes longer for an example than hypothesis allows by default.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
