"""A reward that a small model learns in a few dozen steps: the number of threes in the response, of six characters."""


def threes(prompt, response, answer):
    return response.count("3") / 6
