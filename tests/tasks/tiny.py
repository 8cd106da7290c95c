"""A small real task for the tests of the main job: a residual CNN on a third of scikit-learn's digits."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import tersor


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Net(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.block = Block(width)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x):
        x = self.pool(self.block(self.stem(x)))
        return self.fc(self.dropout(torch.flatten(x, 1)))


def task() -> tersor.Task:
    digits = load_digits()
    images = torch.tensor(digits.images[:900, None] / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target[:900])
    train, validation, test = (TensorDataset(images[a:b], labels[a:b]) for a, b in ((0, 500), (500, 700), (700, 900)))
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(6):
        for x, y in DataLoader(train, batch_size=50, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return tersor.Task(
        model=model.eval(),
        train=DataLoader(train, batch_size=50, shuffle=True),
        validation=DataLoader(validation, batch_size=100),
        test=DataLoader(test, batch_size=100),
    )
