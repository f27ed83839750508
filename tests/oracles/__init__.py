"""Other packages, run as they run themselves: what ours are compared with."""
