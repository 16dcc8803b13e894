"""What the engine's claims of size and speed rest on: each module measures one and writes
benchmarks/results/.
"""
