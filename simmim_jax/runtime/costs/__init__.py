"""What a training step costs: operations, memory and communication. Nothing here runs a step."""
