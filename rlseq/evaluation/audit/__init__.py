"""Was the reward hacked? The optimised reward of a training run against rewards that it was not trained on."""
