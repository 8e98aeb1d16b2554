"""What a run needs of a device's memory and of the network, computed from its configuration without any device.

``plan``           from flags and files to the plan of a run, and the model's wrap units
``estimate``       peak memory of a step: a walk over the wrap units
``communication``  bytes that a rank exchanges with others in a step
``advice``         settings with which a run fits, or needs less
``report``         all of it as text

The model itself is described by its family, in the terms of ``mindspeed_mm.models.memory``.
"""
