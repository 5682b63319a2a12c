"""The run before the run: compiles a training step for GPUs that are not here, and estimates it.

`topology` names GPUs, `compile` asks XLA for their program, `hlo` reads it, `estimate` times it,
`memory` counts bytes in closed form, `search` ranks meshes. Knows no training code: a step comes in
as a function. Nothing here is ever measured; every time is an estimate.
"""
