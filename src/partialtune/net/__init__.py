"""Addresses, downloads and the Hub's client: what crosses the network."""
