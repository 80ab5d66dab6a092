@echo off
setlocal EnableExtensions DisableDelayedExpansion
set "MODELS="
if not "%~1"=="" set "MODELS=%~f1"
set "OLD_PAGE="
for /f "tokens=2 delims=:" %%C in ('chcp') do set "OLD_PAGE=%%C"
chcp 65001 >nul
pushd "%~dp0"
set "RESULT=0"
set "PAUSE_AT_END="
if "%~1"=="/?" goto help
if /i "%~1"=="/undo" goto undo
if defined MODELS goto check
set "PAUSE_AT_END=1"
echo 다른 디스크의 폴더에 모아 둔 모델마다 resources에 링크를 만든다. 모델은 옮기지 않는다.
echo train과 data는 비어 있을 때만 그 폴더로 가는 링크로 바꾼다.
set /p "MODELS=모델을 모아 둔 폴더(예: D:\models): "
if not defined MODELS goto help
set "MODELS=%MODELS:"=%"

:check
if not exist "%MODELS%\" goto missing
pushd "%MODELS%"
set "MODELS=%CD%"
if /i "%MODELS%"=="%~dp0resources" goto itself
echo 모델 폴더: %MODELS%
for /d %%D in (*) do if exist "%%D\config.json" call :link "%~dp0resources\%%~nxD" "%%~fD"
popd
for %%N in (train data) do call :link_output %%N
echo 되돌리기: .create-symbolic-links.bat /undo
goto end

:link_output
call :is_link "%1"
if defined IS_LINK goto keep_output
call :has_files "%1"
if defined HAS_FILES goto stay
if not exist "%MODELS%\%1\" mkdir "%MODELS%\%1"
call :link "%1" "%MODELS%\%1"
if exist "%1.aside\" rmdir "%1.aside" 2>nul
exit /b

:keep_output
echo 그대로 둠(이미 링크다): %1
exit /b

:stay
echo 그대로 둠: %1에 이미 파일이 있어 옮기지 않는다. 새 결과도 이 저장소의 %1에 쌓인다.
echo   옮기려면 robocopy "%1" "%MODELS%\%1" /E /MOVE 를 친 뒤 이 파일을 다시 실행한다.
exit /b

:has_files
set "HAS_FILES="
if not exist "%~1\" exit /b
for /f "delims=" %%F in ('dir /b /a "%~1"') do set "HAS_FILES=1"
exit /b

:link
call :is_link "%~1"
if defined IS_LINK goto keep_link
if not exist "%~1" goto make_link
if exist "%~1.aside" goto occupied
ren "%~1" "%~nx1.aside"
if errorlevel 1 goto busy
echo 옮겨 둠: %~1 -^> %~1.aside
:make_link
mklink /D "%~1" "%~2" >nul 2>nul
if not exist "%~1\" mklink /J "%~1" "%~2" >nul 2>nul
if not exist "%~1\" goto refused
echo 링크: %~1 -^> %~2
exit /b

:keep_link
echo 그대로 둠(이미 링크다): %~1
exit /b

:occupied
echo 건너뜀: %~1과 %~1.aside가 모두 있다. 하나를 다른 곳으로 옮긴 뒤 다시 실행한다.
set "RESULT=1"
exit /b

:busy
echo 건너뜀: %~1을 다른 프로그램이 쓰고 있다. 닫은 뒤 다시 실행한다.
set "RESULT=1"
exit /b

:refused
echo 실패: %~1에 링크를 만들지 못했다. 이 파일을 오른쪽 단추로 눌러 관리자 권한으로 실행한다.
if exist "%~1.aside" ren "%~1.aside" "%~nx1"
set "RESULT=1"
exit /b

:undo
for /d %%D in (resources\*) do call :unlink "resources\%%~nxD"
for %%N in (train data) do call :unlink "%%N"
for /d %%D in (resources\*.aside) do call :restore "resources\%%~nD"
for %%N in (train data) do if exist "%%N.aside" call :restore "%%N"
echo 되돌리기를 마쳤다. 지운 것은 링크뿐이다. 모델 폴더의 모델과 train과 data는 그대로 있다.
goto end

:unlink
call :is_link "%~1"
if not defined IS_LINK exit /b
rmdir "%~1"
if exist "%~1" goto undo_failed
echo 링크를 지움: %~1
exit /b

:undo_failed
echo 실패: 링크 %~1을 지우지 못했다. 쓰는 프로그램을 닫고 다시 실행한다.
set "RESULT=1"
exit /b

:restore
if exist "%~1" exit /b
ren "%~1.aside" "%~nx1"
echo 제자리로: %~1.aside -^> %~1
exit /b

:is_link
set "IS_LINK="
set "ATTRIBUTES="
for %%A in ("%~1") do set "ATTRIBUTES=%%~aA"
if defined ATTRIBUTES if not "%ATTRIBUTES:l=%"=="%ATTRIBUTES%" set "IS_LINK=1"
exit /b

:missing
echo 오류: 폴더가 없다: %MODELS%
set "RESULT=2"
goto end

:itself
popd
echo 오류: 이 저장소의 resources 폴더다. 모델을 모아 둔 다른 폴더를 적는다.
set "RESULT=2"
goto end

:help
echo 쓰는 법: .create-symbolic-links.bat D:\models
echo   D:\models 안의 모델마다 resources에 링크를 만든다. 모델은 옮기지 않는다.
echo   resources에 같은 이름의 진짜 폴더가 있으면 지우지 않고 이름 뒤에 .aside를 붙여 둔다.
echo   train과 data는 없거나 비었을 때만 D:\models\train과 D:\models\data로 가는 링크로 바꾼다.
echo   학습한 결과가 이미 있는 train은 그대로 둔다.
echo 되돌리기: .create-symbolic-links.bat /undo
set "RESULT=2"
if "%~1"=="/?" set "RESULT=0"

:end
popd
if defined PAUSE_AT_END pause
if defined OLD_PAGE chcp %OLD_PAGE% >nul
exit /b %RESULT%
