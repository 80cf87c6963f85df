"""Programs of others, measured beside ours by experiments/peers.py."""

from experiments.support.peers.huggingface import HuggingFace
from experiments.support.peers.peer import Peer

PEERS: dict[str, Peer] = {"huggingface": HuggingFace(False), "huggingface_offloaded": HuggingFace(True)}
"""By the name that their rows have as plan."""
