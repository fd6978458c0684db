"""Several processes as one program: their numbers, rendezvous, agreement and messages."""
