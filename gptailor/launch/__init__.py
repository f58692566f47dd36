"""Start, stop and find engine processes, wait for a device, run other model work.

No torch, SMAC or Streamlit: starting something stays quick and small.
"""
