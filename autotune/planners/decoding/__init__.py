"""Speculative decoding in numbers: trees of candidates, what they are expected to accept, and which of them pays.

Pure functions of numbers, no torch, no clock. Nothing here knows what a plan, a program or a drafter is; callers
measure acceptances and seconds and translate.
"""
