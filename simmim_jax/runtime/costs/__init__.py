"""The cost of a training step: FLOPs, memory and communication. Nothing here runs a step."""
