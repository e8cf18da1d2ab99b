"""Commands that submit dist_colorize to clusters; installed as dist_colorize.launch."""
