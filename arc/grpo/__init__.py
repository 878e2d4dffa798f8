"""Reinforcement learning: rewards, prompts, scan, rollouts, guard, trainer."""
