"""What `python -m bitsandbytes` shows."""
