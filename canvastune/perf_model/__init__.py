"""The planner's rooms: what the model is (`sizes`), what a step holds (`memory`), does (`work`) and
takes (`accelerators`, `time`).
"""
