"""Methods: one file per paper. Their classes are here, too, with typed options: `from kvfold.methods import SnapKV`."""

from typing import TYPE_CHECKING, Any

from kvfold.methods.base import Method, MethodInfo, Pipeline, method
from kvfold.methods.registry import get_method, list_methods, parse
from kvfold.methods.scored import Scored, Wrapper
from kvfold.views import CacheView, LookAhead, ReadOn

if TYPE_CHECKING:  # for editors; a test holds the list
    from kvfold.methods.a2ats import A2ATS as A2ATS
    from kvfold.methods.adakv import AdaKV as AdaKV
    from kvfold.methods.attention_gate import AttentionGate as AttentionGate
    from kvfold.methods.cake import CAKE as CAKE
    from kvfold.methods.cam import CaM as CaM
    from kvfold.methods.chelsea import Chelsea as Chelsea
    from kvfold.methods.compresskv import CompressKV as CompressKV
    from kvfold.methods.d2o import D2O as D2O
    from kvfold.methods.decoding import Decoding as Decoding
    from kvfold.methods.delta import Delta as Delta
    from kvfold.methods.duoattention import DuoAttention as DuoAttention
    from kvfold.methods.dynamickv import DynamicKV as DynamicKV
    from kvfold.methods.elastic_cache_vlm import ElasticCache as ElasticCache
    from kvfold.methods.elitekv import EliteKV as EliteKV
    from kvfold.methods.ems import EMS as EMS
    from kvfold.methods.epicache import EpiCache as EpiCache
    from kvfold.methods.expected_attention import ExpectedAttention as ExpectedAttention
    from kvfold.methods.fastkv import FastKV as FastKV
    from kvfold.methods.fp8 import Float8 as Float8
    from kvfold.methods.full import Full as Full
    from kvfold.methods.h2o import H2O as H2O
    from kvfold.methods.headkv import HeadKV as HeadKV
    from kvfold.methods.infllm import InfLLM as InfLLM
    from kvfold.methods.jrt_prompt import JRTPrompt as JRTPrompt
    from kvfold.methods.kcache import KCache as KCache
    from kvfold.methods.keepkv import KeepKV as KeepKV
    from kvfold.methods.keydiff import KeyDiff as KeyDiff
    from kvfold.methods.keyformer import Keyformer as Keyformer
    from kvfold.methods.kivi import KIVI as KIVI
    from kvfold.methods.knorm import KNorm as KNorm
    from kvfold.methods.kvcrush import KVCrush as KVCrush
    from kvfold.methods.kvfold import KVFold as KVFold
    from kvfold.methods.kvmerger import KVMerger as KVMerger
    from kvfold.methods.kvquant import KVQuant as KVQuant
    from kvfold.methods.kvzip import KVzip as KVzip
    from kvfold.methods.lacache import LaCache as LaCache
    from kvfold.methods.less import LESS as LESS
    from kvfold.methods.look_m import LookM as LookM
    from kvfold.methods.lserve import LServe as LServe
    from kvfold.methods.mikv import MiKV as MiKV
    from kvfold.methods.minicache import MiniCache as MiniCache
    from kvfold.methods.mpcache import MPCache as MPCache
    from kvfold.methods.mustafar import Mustafar as Mustafar
    from kvfold.methods.nosa import NOSA as NOSA
    from kvfold.methods.pqcache import PQCache as PQCache
    from kvfold.methods.prefixkv import PrefixKV as PrefixKV
    from kvfold.methods.pyramidkv import PyramidKV as PyramidKV
    from kvfold.methods.quest import Quest as Quest
    from kvfold.methods.r_kv import RKV as RKV
    from kvfold.methods.razorattention import RazorAttention as RazorAttention
    from kvfold.methods.scissorhands import Scissorhands as Scissorhands
    from kvfold.methods.sentencekv import SentenceKV as SentenceKV
    from kvfold.methods.shadowkv import ShadowKV as ShadowKV
    from kvfold.methods.snapkv import SnapKV as SnapKV
    from kvfold.methods.speckv import SpecKV as SpecKV
    from kvfold.methods.specpc import SpecPC as SpecPC
    from kvfold.methods.streamingllm import StreamingLLM as StreamingLLM
    from kvfold.methods.think import ThinK as ThinK
    from kvfold.methods.tokenselect import TokenSelect as TokenSelect
    from kvfold.methods.tova import TOVA as TOVA
    from kvfold.methods.turboquant import TurboQuant as TurboQuant
    from kvfold.methods.windowkv import WindowKV as WindowKV
    from kvfold.methods.windows import Windows as Windows
    from kvfold.methods.zipcache import ZipCache as ZipCache

__all__ = [
    "CacheView",
    "LookAhead",
    "Method",
    "MethodInfo",
    "Pipeline",
    "ReadOn",
    "Scored",
    "Wrapper",
    "get_method",
    "list_methods",
    "method",
    "parse",
]


def __getattr__(name: str) -> Any:
    # Not before somebody asks: importing this package registers no method.
    for info in list_methods() if name[:1].isupper() else ():
        if info.cls.__name__ == name:
            return info.cls
    raise AttributeError(f"module 'kvfold.methods' has no attribute {name!r}")
