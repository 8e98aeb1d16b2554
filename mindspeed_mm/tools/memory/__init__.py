"""What a run needs of a device's memory and of the network, computed from its configuration without any device.

``plan``           what is asked about: geometry, layout, types, batch, what trains, what is computed again
``parameters``     which tensors there are, and how FSDP2 groups and shards them
``activations``    what layers keep for backward, and what they need while they run
``estimate``       a step walked through: what is held at its fullest moment
``communication``  bytes that a process exchanges with others in a step
``report``         all of it as text, and which knob helps
"""
