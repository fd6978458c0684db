"""Serve one model from many processes: process 0 has the queue, and the others repeat each of its steps."""
