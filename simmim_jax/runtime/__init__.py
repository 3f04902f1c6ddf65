"""How a run uses machines: devices, processes, compilation."""
