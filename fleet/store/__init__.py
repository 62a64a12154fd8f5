"""The store: one port, etcd behind it in earnest and an in-memory twin for simulation."""
