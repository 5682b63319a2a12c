"""The methods of the Open Inference Protocol v2 (`inference.GRPCInferenceService`).

Protocol: github.com/kserve/open-inference-protocol, with Triton's extensions for streams,
statistics, configuration and the repository; the messages are those that `tritonclient` ships.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import asdict

import grpc
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceServicer

from internjax.errors import UserError
from internjax.serve.grpc import wire
from internjax.serve.grpc.asked import Served, read_request
from internjax.serve.grpc.contract import INPUTS, OUTPUTS, VERSION, Tensor, config_text
from internjax.serve.grpc.replies import AnswerFailed, AnswerStopped, Reply, answer
from internjax.serve.grpc.statistics import Statistics
from internjax.serve.scheduler import QueueFull
from internjax.serve.thread import EngineClosed
from internjax.version import __version__

Context = grpc.aio.ServicerContext
EMPTY_FINAL = "triton_enable_empty_final_response"
"""Parameter of a stream's client: it wants the end marked. The last news is always marked."""


class NotServed(UserError):
    """The model or the version is not here."""


STATUS = {
    NotServed: grpc.StatusCode.NOT_FOUND,
    UserError: grpc.StatusCode.INVALID_ARGUMENT,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    EngineClosed: grpc.StatusCode.UNAVAILABLE,
    AnswerStopped: grpc.StatusCode.UNAVAILABLE,
    AnswerFailed: grpc.StatusCode.INTERNAL,
}
REFUSALS = tuple(STATUS)


class Inference(GRPCInferenceServiceServicer):
    """The service over one served model and its adapters."""

    def __init__(self, model: Served):
        self.model = model
        self.statistics: defaultdict[str, Statistics] = defaultdict(Statistics)  # by model name

    # What is here ------------------------------------------------------------------------------

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context):
        return pb.ServerLiveResponse(live=not self.model.engine.lost)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context):
        return pb.ServerReadyResponse(ready=self.model.engine.ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context):
        here = request.name in self.model.names() and request.version in ("", VERSION)
        return pb.ModelReadyResponse(ready=here and self.model.engine.ready)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context):
        extensions = ("parameters", "statistics", "model_configuration")
        return pb.ServerMetadataResponse(
            name="internjax", version=__version__, extensions=extensions
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context):
        await self._require(request.name, request.version, context)
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[VERSION],
            platform="internjax",
            inputs=[_described(tensor) for tensor in INPUTS],
            outputs=[_described(tensor) for tensor in OUTPUTS],
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context):
        await self._require(request.name, request.version, context)
        engine = {k: str(v) for k, v in asdict(self.model.engine.engine.config).items()}
        text = config_text(request.name, "internjax", engine)
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        return pb.ModelConfigResponse(config=config)

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context):
        names = [request.name] if request.name else self.model.names()
        await self._require(names[0], request.version, context)
        steps = self.model.engine.engine.stats.steps
        messages = [self.statistics[name].message(name, VERSION, steps) for name in names]
        return pb.ModelStatisticsResponse(model_stats=messages)

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context):
        engine = self.model.engine
        if request.ready and not engine.ready:
            return pb.RepositoryIndexResponse()
        state = "READY" if engine.ready else "UNAVAILABLE"
        entries = [
            pb.RepositoryIndexResponse.ModelIndex(
                name=name, version=VERSION, state=state, reason=engine.reason
            )
            for name in self.model.names()
        ]
        return pb.RepositoryIndexResponse(models=entries)

    # Answers -----------------------------------------------------------------------------------

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context):
        try:
            async with contextlib.aclosing(self._answer(request, stream=False)) as replies:
                reply = await anext(replies)
            return wire.response(request, reply.arrays, VERSION)
        except REFUSALS as error:
            await context.abort(status_of(error), str(error))

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ):
        """Answers the requests of one stream side by side; each response names its request's id.

        An error is told in the stream, which goes on, as Triton does it. A client that sends the
        metadata `triton_grpc_error: true` gets a status instead, which ends the stream.
        """
        as_status = dict(context.invocation_metadata()).get("triton_grpc_error") == "true"
        news: asyncio.Queue[News | None] = asyncio.Queue()
        feeding = asyncio.create_task(self._feed(requests, news))
        try:
            while (item := await news.get()) is not None:
                request, told = item
                if isinstance(told, Exception) and as_status:
                    await context.abort(status_of(told), str(told))
                await context.write(_streamed(request, told))
            await feeding
        finally:  # also when the client has gone: everything of the stream ends with it
            feeding.cancel()
            await asyncio.wait([feeding])

    async def _feed(self, requests: AsyncIterator[pb.ModelInferRequest], news: asyncio.Queue):
        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in requests:
                    tasks.create_task(self._tell(request, news))
        finally:
            news.put_nowait(None)

    async def _tell(self, request: pb.ModelInferRequest, news: asyncio.Queue) -> None:
        try:
            async with contextlib.aclosing(self._answer(request, stream=True)) as replies:
                async for reply in replies:
                    news.put_nowait((request, reply))
        except REFUSALS as error:
            news.put_nowait((request, error))

    async def _answer(self, request: pb.ModelInferRequest, *, stream: bool) -> AsyncIterator[Reply]:
        self._check(request.model_name, request.model_version)
        parameters = wire.read_parameters(request)
        if stream:
            parameters.pop(EMPTY_FINAL, None)
        names = wire.read_output_names(request)
        inputs = wire.read_inputs(request)
        adapter = "" if request.model_name == self.model.name else request.model_name
        options = {"stream": stream, "adapter": adapter}
        asked = read_request(self.model, inputs, parameters, names, **options)
        if asked.stream and not stream:
            raise UserError("stream=true: ModelInfer answers once; call ModelStreamInfer.")
        count = self.statistics[request.model_name].count
        replies = answer(self.model.engine, asked, count)
        async with contextlib.aclosing(replies):
            async for reply in replies:
                yield reply

    def _check(self, name: str, version: str) -> None:
        names = self.model.names()
        if name not in names or version not in ("", VERSION):
            raise NotServed(
                f"the model {name!r}{f' version {version!r}' if version else ''} is not served "
                f"here; served: {', '.join(names)}, version {VERSION!r}."
            )

    async def _require(self, name: str, version: str, context: Context) -> None:
        try:
            self._check(name, version)
        except NotServed as error:
            await context.abort(STATUS[NotServed], str(error))

    # What is not here --------------------------------------------------------------------------

    async def _unserved(self, request, context: Context):
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED,
            "this is not served: models are not loaded over gRPC, tensors travel in messages.",
        )

    RepositoryModelLoad = RepositoryModelUnload = _unserved
    SystemSharedMemoryRegister = SystemSharedMemoryUnregister = SystemSharedMemoryStatus = _unserved
    CudaSharedMemoryRegister = CudaSharedMemoryUnregister = CudaSharedMemoryStatus = _unserved
    TraceSetting = LogSettings = _unserved


News = tuple[pb.ModelInferRequest, Reply | Exception]


def status_of(error: Exception) -> grpc.StatusCode:
    """Returns the status that a refusal becomes."""
    return next(code for kind, code in STATUS.items() if isinstance(error, kind))


def _streamed(request: pb.ModelInferRequest, told: Reply | Exception):
    """Returns the message of the stream that tells a reply or an error."""
    if isinstance(told, Exception):
        named = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
        return pb.ModelStreamInferResponse(error_message=str(told), infer_response=named)
    response = wire.response(request, told.arrays, VERSION)
    response.parameters["triton_final_response"].bool_param = told.final
    return pb.ModelStreamInferResponse(infer_response=response)


def _described(tensor: Tensor) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=tensor.name, datatype=tensor.datatype, shape=tensor.dims
    )
