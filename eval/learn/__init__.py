"""Learning settings from samples: `tune` searches a policy's settings, `train_exit` trains DyVTE's exit gates."""
