"""Prints what coming_from/peft.md shows of peft; peft_output.txt is its output.

It needs torch and peft; the tests do not run it.
"""

import peft
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(64, 128)
        self.head = torch.nn.Linear(128, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(x)))


torch.manual_seed(0)
config = peft.LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["hidden"],
    modules_to_save=["head"],
)
model = peft.get_peft_model(Net(), config)
print(f"peft {peft.__version__}, torch {torch.__version__}")
model.print_trainable_parameters()

trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.Adam(trained, lr=1e-2)
x, y = torch.ones(8, 64), torch.zeros(8, 3)
for _ in range(100):
    loss = ((model(x) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss.item():.4f}")
model.save_pretrained("/tmp/peft-adapter")
merged = model.merge_and_unload()
print(type(merged).__name__)
