"""Frozen networks: what they compute of each row once, and what is learnt from that."""
