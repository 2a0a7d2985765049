"""This host's endpoints: attached, watched, recorded, freed."""
