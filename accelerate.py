def accelerate_torchvision():
    pass
