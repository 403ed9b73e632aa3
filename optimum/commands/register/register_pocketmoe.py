"""What `optimum-cli` finds of PocketMoE: it looks through this folder in every installed package."""

from optimum.commands.export.base import ExportCommand

from pocketmoe.integrations.optimum_cli import ExportPocketMoE, PocketMoECommands

REGISTER_COMMANDS = [(ExportPocketMoE, ExportCommand), PocketMoECommands]
