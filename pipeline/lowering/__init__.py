"""Lowering: from a schedule to tables of integers, which the executor interprets."""
