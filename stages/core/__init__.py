"""What the training stages share: models, roles, the tree forward, losses, the loop, rollouts and guards."""
