"""Every objective as a block, in one union on `loss_type`; those of reward models are in another.

Names follow TRL's options wherever TRL has one.

Notation: w and l are the chosen and the rejected candidate (the first and the last of the group), |y| counts completion
tokens, h(y) = log pi(y) - log pi_ref(y) is the log-ratio of summed log-probs, r(y) = beta h(y) the implicit reward.
The functions in `raylign.losses` carry the same equations.
"""

from raylign.config.losses.function import FunctionLossBlock
from raylign.config.losses.grpo import GrpoLossBlock
from raylign.config.losses.listwise import (
    AllPairsLossBlock,
    KtoLossBlock,
    LambdaLossBlock,
    ListMleLossBlock,
    ListNetLossBlock,
    PlackettLuceLossBlock,
)
from raylign.config.losses.mix import LossBlock, LossUnion, Member, MixLossBlock, Objective
from raylign.config.losses.pairwise import (
    AotLossBlock,
    ApoLossBlock,
    BcoPairLossBlock,
    DiscopopLossBlock,
    DpopLossBlock,
    ExoPairLossBlock,
    HingeLossBlock,
    IpoLossBlock,
    NcaPairLossBlock,
    OdpoLossBlock,
    ProbitLossBlock,
    RdpoLossBlock,
    RobustLossBlock,
    SigmoidLossBlock,
    SigmoidNormLossBlock,
    SppoHardLossBlock,
)
from raylign.config.losses.reference_free import AlphapoLossBlock, CpoLossBlock, OrpoLossBlock, SimpoLossBlock
from raylign.config.losses.reward_model import (
    BradleyTerryRewardLossBlock,
    PlackettLuceRewardLossBlock,
    ProbitRewardLossBlock,
    RewardLossBlock,
    RewardLossUnion,
)
from raylign.config.losses.terms import EntropyLossBlock, KlLossBlock, SftLossBlock, XpoLossBlock

TrainerLoss = LossBlock | RewardLossBlock
"""What a trainer learns by: a policy's loss, or a reward model's."""


def members(loss: TrainerLoss) -> tuple[Member | RewardLossBlock, ...]:
    """The losses that `loss` is made of: those of a mix, else itself."""
    return loss.losses if isinstance(loss, MixLossBlock) else (loss,)


def loss_functions(loss: TrainerLoss) -> list[str]:
    """`module:function` of each loss of the user's."""
    return [member.function for member in members(loss) if isinstance(member, FunctionLossBlock)]


__all__ = [
    "AllPairsLossBlock",
    "AlphapoLossBlock",
    "AotLossBlock",
    "ApoLossBlock",
    "BcoPairLossBlock",
    "BradleyTerryRewardLossBlock",
    "CpoLossBlock",
    "DiscopopLossBlock",
    "DpopLossBlock",
    "EntropyLossBlock",
    "ExoPairLossBlock",
    "FunctionLossBlock",
    "GrpoLossBlock",
    "HingeLossBlock",
    "IpoLossBlock",
    "KlLossBlock",
    "KtoLossBlock",
    "LambdaLossBlock",
    "ListMleLossBlock",
    "ListNetLossBlock",
    "LossBlock",
    "LossUnion",
    "Member",
    "MixLossBlock",
    "NcaPairLossBlock",
    "Objective",
    "OdpoLossBlock",
    "OrpoLossBlock",
    "PlackettLuceLossBlock",
    "PlackettLuceRewardLossBlock",
    "ProbitLossBlock",
    "ProbitRewardLossBlock",
    "RdpoLossBlock",
    "RewardLossBlock",
    "RewardLossUnion",
    "RobustLossBlock",
    "SftLossBlock",
    "SigmoidLossBlock",
    "SigmoidNormLossBlock",
    "SimpoLossBlock",
    "SppoHardLossBlock",
    "TrainerLoss",
    "XpoLossBlock",
    "loss_functions",
    "members",
]
