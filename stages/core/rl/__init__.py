"""Reinforcement learning of responses: prompts, rewards, experience, updates, and what tells whether it goes well."""
