"""What a run would cost, before any of it: bytes, FLOPs, memory, messages, time and energy.

`predict` is the door; nothing is trained and no weight is loaded.
"""
