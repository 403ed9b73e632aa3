"""What `optimum-cli` finds of PocketMoE: it looks through this folder in every installed package."""

from optimum.commands.export.base import ExportCommand

from pocketmoe.integrations.optimum_cli import ExportPocketMoE, PocketMoECommands

# To be taken once, also where two installations lie on the path, each of which it looks through.
REGISTER_COMMANDS = iter([(ExportPocketMoE, ExportCommand), PocketMoECommands])
