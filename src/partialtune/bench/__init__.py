"""`partialtune bench`: seconds a step, memory and utilisation of recipes on this machine, beside full fine-tuning."""
