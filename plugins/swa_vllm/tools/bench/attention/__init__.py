"""One attention call of this plugin's kernels, timed beside the kernels of others."""
