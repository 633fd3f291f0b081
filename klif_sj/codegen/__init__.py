"""From one time step in Python to the text of a multi-step kernel: trace -> emit -> program -> kernel."""
