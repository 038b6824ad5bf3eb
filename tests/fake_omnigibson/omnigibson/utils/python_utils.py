def recursively_convert_to_torch(state):
    return state
