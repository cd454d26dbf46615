"""Triton kernels of nps-compress. Importing a kernel module needs Triton; the form does not."""
