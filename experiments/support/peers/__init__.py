"""Programs of others, measured beside ours by experiments/peers.py."""

from experiments.support.peers.huggingface import HUGGINGFACE, HUGGINGFACE_OFFLOADED
from experiments.support.peers.peer import Peer

PEERS: dict[str, Peer] = {"huggingface": HUGGINGFACE, "huggingface_offloaded": HUGGINGFACE_OFFLOADED}
"""By the name that their rows have as plan."""
