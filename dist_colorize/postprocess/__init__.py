"""Post-processing: from the network's features to a finished photograph, repaired where the network was unsure."""
