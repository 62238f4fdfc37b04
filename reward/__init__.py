"""From responses to numbers: the scalar head, rules, reward shaping and intervals."""
