"""Constrain answers to a JSON schema or a regular expression; needs the extra `constrain`.

Begin with `constraint.py`.
"""
