"""Many processes as one program: who they are, how they meet, and what they must agree on."""
