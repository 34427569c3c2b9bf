"""A plan carried out in any Trainer (`attach`) or loop (`audited`): phases, optimizer, proof, fast paths.

Fast paths give the numbers of the plain path in less time and memory; each has a test of that, and a switch. Under bf16
kept states of a frozen prefix are rounded to 16 bits, once; all else is as exact as the plain path.
"""
