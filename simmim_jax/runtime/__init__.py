"""Devices, processes and compilation."""
