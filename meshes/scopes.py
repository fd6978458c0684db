"""Named scopes by which a program tells those who read it what its instructions cannot say."""

RARELY = "rarely"
"""The scope of a loop whose number of iterations depends on data and is nearly always 0."""
