"""A Ray cluster of two nodes on this machine, until standard input ends; prints its address. Runs in the environment of offline/."""

import os
import sys

from ray.cluster_utils import Cluster

cores = sorted(os.sched_getaffinity(0))
half = max(1, len(cores) // 2)
cluster = Cluster()
for share in (cores[:half], cores[-half:]):
    os.sched_setaffinity(0, share)  # which the node's processes inherit
    cluster.add_node(num_cpus=2, object_store_memory=100_000_000, include_dashboard=False)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
