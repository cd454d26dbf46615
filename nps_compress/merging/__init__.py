"""Merge task vectors: one small file for each method, all behind the contract of contract.py."""
