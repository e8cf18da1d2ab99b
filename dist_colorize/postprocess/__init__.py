"""Post-processing: from the network's features to a finished photograph, with what the network was unsure of repaired."""
