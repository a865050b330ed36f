"""Ranks and their launchers: who this process is, which rows it does, and how it is asked to stop.

world: rank, size and array slice, from the launcher's variables. rendezvous: what rank 0 knows reaches all ranks.
sharding: which rows belong to which rank. messages: which rank tells the user what. signals: a request to stop.
mpi: the ranks of `mpirun` find each other. rank_pool: they share the work of a merge.
"""
